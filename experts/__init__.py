"""One diffusion model per cluster, trained as if the others did not exist.

    shards ──codec──► clean ──noise_path──► noised ──network──► prediction ──predictions──► velocity

Open `expert.py` for what an expert is and how one is trained from a folder, `train.py` for the loop,
`loss.py` for the objective, `networks.py` to add a network, `codec.py` to add a latent space,
`latents.py` for what is in a batch, `checkpoint.py` for what survives a crash.
By hand, without an orchestrator: `python -m experts --help`.
"""
