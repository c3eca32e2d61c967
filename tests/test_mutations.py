"""The faults of helpers/mutations.py, which has tests run on each of them."""

from mutations import MUTATIONS, ROOT


def test_every_mutation_can_be_made():
    """Which `python tests/helpers/mutations.py` does, to see that a test fails."""
    for mutation in MUTATIONS:
        text = (ROOT / f"{mutation.script}.py").read_text()
        assert text.count(mutation.old) == 1, mutation
    assert len(MUTATIONS) >= 30
