"""Define the commands' options as dataclasses that tyro reads; none imports torch, so that --help is fast."""
