"""Many experts, one velocity field: sampled like one model, scored against held-out images.

    experts ─┐                                                        ┌──► images ──► scores
             ├──► Ensemble ──guidance──► velocity ──solver──► latents ┤
    router ──┘                                                        └──► codec

Open `ensemble.py` for how experts become one velocity, `routing.py` for what a trajectory remembers,
`guidance.py` for its two branches, `sampler.py` to add a solver, `sample.py` for seeds to images,
`pipeline.py` for the folder on disk, `evaluate.py` for scores and `metrics.py` for their equations.
"""
