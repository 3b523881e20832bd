"""What the commands are told: dataclasses that tyro reads. None imports torch, so that help is there at once."""
