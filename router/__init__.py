"""Which expert speaks for this noised sample, at this t, under this condition.

    clusters' latents ──train──► Router: (noised, t, condition) ──► logits ──select──► gates
                                         (condition) ──► prior's logits ──┘

Open `router.py` for what a router is, `select.py` to add a selection, `model.py` for the kinds of it, `train.py` and
`loss.py` for how it learns, `calibration.py` for its temperatures, `quality.py` for how good it is at every t,
`change.py` to add or remove an expert.
"""
