"""Many experts, one velocity field: sampled like one model, scored against held-out images.

    experts ─┐                                                        ┌──► images ──► scores
             ├──► Ensemble ──guidance──► velocity ──solver──► latents ┤
    router ──┘                                                        └──► codec

ensemble.py                how experts combine to one velocity
routing.py                 state of a batch of trajectories
solvers.py                 solvers and few-step sampling; add a solver here
multi_network_experts.py   experts of several networks
expert_registry.py         kinds of experts on disk; add a kind here
pipeline.py                the folder on disk
membership.py              remove, restore and add experts
sampling/                  seeds to images: guidance, reflection, samples for a router
evaluation/                scores, their metrics, the search for a selection
analysis/                  memorization tests, Diffusion Classifier
compression/               smaller and faster ensembles
"""
