"""Compare what must be the same on all machines that work on one file."""

from collections.abc import Mapping

from ffcv_ops.errors import UserError


class OtherMachine(UserError):
    """Another machine cannot do the work, or would make other bytes than the machine that leads."""


def compare_versions(where: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise OtherMachine if a text of another machine differs from the text of the machine that leads."""
    for name, version in ours.items():
        if theirs.get(name) != version:
            raise OtherMachine(
                f"{where} would make other bytes than the machine that leads: {name} is {theirs.get(name)} there and "
                f"{version} here; give all machines the same environment"
            )
