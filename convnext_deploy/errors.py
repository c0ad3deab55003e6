"""Every error a user can meet.

ConvNextDeployError            one line: what was wrong, the value, what was expected, what to do
├── UsageError                 the request cannot be carried out as asked (exit code 2)
│   ├── WeightsError           a checkpoint that cannot be found, read, or matched to the architecture
│   ├── ArtifactError          an artifact folder that is missing, damaged, or of another schema
│   ├── DataError              an image source that cannot be read
│   ├── InputError             a batch whose shape, dtype or values the artifact does not take
│   └── MissingPackageError    an optional package that is not installed
└── CheckFailed                the work was done and a check on it failed (exit code 1)
    ├── BuildError             a converter or compiler refused the model
    ├── PassError              an exact rewrite moved the outputs
    ├── ParityError            an artifact does not compute what its PyTorch source computes
    ├── PrecisionError         an artifact does not run in the precision that was asked for
    └── WorkerError            a process that builds or measures crashed, or reported an error
"""

import re

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # PyTorch sets parts of its messages in bold


class ConvNextDeployError(Exception):
    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(_TERMINAL_CODES.sub("", str(message)))


class UsageError(ConvNextDeployError):
    exit_code = 2


class WeightsError(UsageError):
    pass


class ArtifactError(UsageError):
    pass


class DataError(UsageError):
    pass


class InputError(UsageError):
    pass


class MissingPackageError(UsageError):
    pass


class CheckFailed(ConvNextDeployError):
    pass


class BuildError(CheckFailed):
    pass


class PassError(CheckFailed):
    pass


class ParityError(CheckFailed):
    pass


class PrecisionError(CheckFailed):
    pass


class WorkerError(CheckFailed):
    pass
