"""What the tests of commands share: a command run in this process."""

import json

import pytest

from dvt.cli import main


@pytest.fixture
def run(capsys):
    """A function that runs a command with --json and returns its object or, if it is to fail, its message."""

    def command(*arguments, expect=0):
        code = main([str(each) for each in (*arguments, "--json")])
        out, errors = capsys.readouterr()
        assert code == expect, errors
        return json.loads(out) if code == 0 else " ".join(errors.split())

    return command
