"""Arguments of a kernel's entry point: exactly those that its body reads."""

from __future__ import annotations

import re

FEATURES = tuple(
    f"{side}_{name}_ptr"
    for side in ("q", "k")
    for name in ("weight", "bias", "norm_weight", "norm_bias")
)
"""Parameters of the ``eva`` rule's two feature maps, in the order of the ops."""

POINTERS = (
    *("q_ptr", "k_ptr", "v_ptr", "rfa_k_ptr", "rfa_v_ptr", "rfa_bias_ptr", "bias_columns_ptr"),
    *("mass_k_ptr", "mass_v_ptr", "phi_ptr", "p_ptr", "b_ptr", "omega_ptr"),
    *("out_ptr", "lse_ptr", "do_ptr", "lse2_ptr", "delta_ptr"),
    *("dq_ptr", "dk_ptr", "dv_ptr", "drfa_k_ptr", "drfa_v_ptr", "drfa_bias_ptr"),
    *("dk_sink_ptr", "dv_sink_ptr", "dphi_ptr", "dp_ptr", "domega_ptr"),
    *("start_ptr", "stop_ptr", "begin_ptr", "end_ptr", "chunk_first_ptr", "valid_ptr"),
    *("slopes_ptr", "chunk_mean_ptr", "seed_ptr"),
    *("exact_k_ptr", "exact_v_ptr", "exact_mask_ptr", "key_mask_ptr", "open_q_ptr"),
    *FEATURES,
    *("row_start_ptr", "length_ptr", "partial_ptr"),
    *("selected_ptr", "bits_ptr", "turned_ptr", "scores_ptr", "peaks_ptr"),
    *("bounds_ptr", "selector_weight_ptr", "selector_ptr", "near_k_ptr", "near_v_ptr"),
    *("sink_k_ptr", "sink_v_ptr", "tail_k_ptr", "tail_v_ptr", "key_codes_ptr", "value_codes_ptr"),
    *("key_book_ptr", "value_book_ptr", "book_scale_ptr", "key_words_ptr", "value_words_ptr"),
    *(
        "key_scale_ptr",
        "key_offset_ptr",
        "key_centre_ptr",
        "key_rotation_ptr",
        "value_rotation_ptr",
        "key_step_ptr",
        "key_digit_ptr",
        "key_fields_ptr",
        "value_order_ptr",
        "value_offset_ptr",
        "value_step_ptr",
        "value_digit_ptr",
        "value_fields_ptr",
        "coded_q_ptr",
        "q_scale_ptr",
    ),
    *("exponents_ptr", "written_ptr", "rfa_exponents_ptr"),
    *("members_ptr", "first_member_ptr", "first_piece_ptr", "piece_chunk_ptr"),
    *("dk_parts_ptr", "dv_parts_ptr"),
)

DESCRIPTORS = (
    *(f"{x}_desc{n}" for x in ("q", "k", "v", "rfa_k", "rfa_v", "do") for n in range(4)),
    "bias_columns_desc0",
)
"""Tensor descriptors ``[B, H, rows, D]``, one for each part of the head dimension."""

STRIDES = (
    *("stride_qb", "stride_qh", "stride_qm", "stride_gb", "stride_gh", "stride_gm"),
    *("stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh", "stride_vn", "stride_mean"),
    "stride_mask",
)

LENGTHS = (
    *("heads", "queries", "columns", "chunks", "q_offset", "splits", "state_blocks"),
    "items",
    *(
        "picks",
        "words",
        "runs",
        "room",
        "key_stride",
        "value_stride",
        "rotation_stride",
        "pieces",
        "piece_size",
        "group_words",
    ),
)
"""Integers that are not specialised: a new length is no new kernel."""

NUMBERS = ("score_scale", "scale", "softcap", "drop_below", "keep_scale")


def arguments(body: str) -> tuple[str, ...]:
    """Return the arguments that a kernel's body reads, in a fixed order."""
    words = set(re.findall(r"\w+", body))
    return tuple(n for n in (*DESCRIPTORS, *POINTERS, *STRIDES, *LENGTHS, *NUMBERS) if n in words)
