"""Router: which expert denoises a noised sample, at this t, under this condition.

    latents of all clusters ──train──► Router: (noised, t, condition) ──► logits ──select──► gates
                                              (condition) ──► prior logits ──┘

router.py        the router: a network and the prior
models/          its kinds: mlp, transformer, prior_table, nearest_centroid, density_ratio; add one in `registry.py`
train.py         training and its loss
calibration/     temperatures, the prior p(k | text), calibration errors
quality.py       cross-entropy, accuracy and calibration at every t
selection.py     selections, from logits to gates; add one there
add_remove.py    add or remove an expert
"""
