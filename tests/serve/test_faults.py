"""A slice of `python -m benchmarks.load_test.faults`: bad clients, and a process that is killed."""

from benchmarks.load_test.faults import campaign
from tests.deploy import exports


def test_every_accepted_image_is_answered_once_or_its_connection_closed():
    found = campaign(exports.folder(), requests=300, kills=1, options=["--queue", "48"])
    assert found["wrong"] == []
    assert found["killed"] == 1 and found["exit_code"] == 0
    assert found["tracebacks"] == 0
    assert found["outcomes"]["one: 200"] > 50 and found["outcomes"]["several: 200"] > 10
