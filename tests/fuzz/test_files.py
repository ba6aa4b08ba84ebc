"""A slice of the campaign in `files_fuzz`: no damaged file escapes as another error."""

from tests.fuzz import files_fuzz


def test_every_damaged_file_loads_or_is_a_value_error():
    count = 160
    outcomes = files_fuzz.outcomes(count, seed=0)
    assert sum(outcomes.values()) == count
    assert not [outcome for outcome in outcomes if "escaped" in outcome], outcomes
    refused = {outcome.split()[0] for outcome in outcomes if outcome.endswith("refused")}
    assert refused == set(files_fuzz.KINDS)  # the damage does reach each reader
