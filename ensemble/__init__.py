"""Many experts, one velocity field: sampled like one model, scored against held-out images.

    experts ─┐                                                        ┌──► images ──► scores
             ├──► Ensemble ──guidance──► velocity ──solver──► latents ┤
    router ──┘                                                        └──► codec

Open `ensemble.py` for how experts become one velocity, `routing.py` for what a trajectory remembers, `guidance.py`
for its two branches, `sampler.py` to add a solver, `reflection.py` for weak-to-strong steps, `sample.py` for seeds to
images, `pipeline.py` for the folder on disk, `membership.py` for experts that come and go, `evaluate.py` for scores
and `metrics.py` for their equations, `choose.py` for the selection that suits an ensemble, `audit.py` for copies of
training images, `classify.py` for classes by lowest denoising error, `expert_draws.py` for what experts draw for a
router, `stages/` for ensembles that are made smaller.
"""
