"""Every law of the generated kernels, in processes where Triton interprets kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import law_processes

FILES = {  # and of each file the laws that have a process of their own
    "interpreted_laws.py": (
        ("test_attention_and_its_gradients_are_the_reference",),
        (
            "test_a_row_alone_has_the_bits_that_it_has_in_a_batch",
            "test_a_window_over_everything_is_softmax",
        ),
    ),
    "retrieval_forward_laws.py": (
        (
            "test_attention_is_the_reference_for_what_was_selected",
            "test_a_schedule_changes_no_selection",
        ),
    ),
    "retrieval_backward_laws.py": (),
    "decode_laws.py": (),
    "extend_laws.py": (),
    "retrieval_decode_laws.py": (("test_steps_are_the_blocked_code",),),
    "vecinfer_laws.py": (
        (
            "test_what_no_token_was_written_to_is_never_read",
            "test_a_token_in_fp8_that_is_not_finite_is_nan",
        ),
    ),
}
SHARES = [share for file, alone in FILES.items() for share in law_processes.shares(file, *alone)]


@pytest.mark.parametrize(("file", "laws"), SHARES)
def test_laws(file, laws, tmp_path):
    law_processes.run(file, laws, tmp_path)


def test_no_file_of_laws_is_left_out():
    assert set(FILES) == {path.name for path in Path(__file__).parent.glob("*_laws.py")}
