"""Reasoning in continuous thoughts (Coconut, Hao et al. 2024) in JAX and Flax.

Start with `coconut.latent.rollout.rollout` over a `coconut.models.decoder.Decoder`, or with
`coconut.training.loop.train`. The glossary is `coconut.types`.
"""
