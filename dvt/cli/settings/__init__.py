"""Options of the commands: dataclasses that tyro reads. None imports torch, so that help is there at once."""
