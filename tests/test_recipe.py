"""What every command shares: the check of its launch. (Recipes: the tests of the commands that read them.)"""

import pytest

from ijepa.recipe import CPU_REMEDY, check_launch


def test_several_processes_that_do_not_see_each_other_are_an_error(monkeypatch):
    """What torchrun on the CPU without ACCELERATE_USE_CPU is: two runs that write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but 1 would work together; on the CPU, set"):
        check_launch(1, CPU_REMEDY)
    check_launch(2, CPU_REMEDY)
