"""svdconvert doctor: what a report of a fault needs to know of this machine and installation."""

from svdconvert.diagnosis.facts import Fact
from svdconvert.diagnosis.hub_facts import hub_facts
from svdconvert.diagnosis.machine import machine_facts
from svdconvert.diagnosis.packages import package_facts, program_facts


def doctor() -> list[Fact]:
    """Facts about the program, its packages, this machine and its access to the Hub; nothing is asked there.

    Something that the program needs is missing if a fact has the state "missing".
    """
    return [*program_facts(), *package_facts(), *machine_facts(), *hub_facts()]
