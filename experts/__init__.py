"""One diffusion model per cluster, trained independently of the others.

    shards ──codec──► clean ──noise schedule──► noised ──network──► prediction ──conversion──► velocity

`expert.py` defines an expert and trains one from a folder, `training/trainer.py` is the training loop,
`training/loss.py` the objective, `training/latent_dataset.py` the batch and `training/checkpoint.py` the state that
survives a crash. Add a network in `networks/registry.py` and a latent space in `codecs/registry.py`.
Without an orchestrator: `python -m experts --help`.
"""
