"""Hand over to the package in dvt/, where a clone named `dvt` is found before the installed package.

Python finds this folder by its name when the one that it lies in is on sys.path; without this file it would be taken
for an empty package.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent / "dvt")]
__file__ = str(Path(__path__[0]) / "__init__.py")
exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))
