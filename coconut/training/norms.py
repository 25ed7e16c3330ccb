"""How long thoughts are beside token embeddings: what breaks first where a model meets inputs unlike any it knows."""

import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coconut.losses import Ratio, ratio
from coconut.models.decoder import Decoder
from coconut.types import Batch, Latent, ModelOutput

LOG = logging.getLogger(__name__)


def norm_metrics(decoder: Decoder, batch: Batch, output: ModelOutput) -> dict[str, Ratio]:
    """The mean norm of thoughts and that of token embeddings, over the valid columns of a batch.

    They cost no pass: the rollout has made both already, and no gradient flows through them.

    Returns:
      ``thought_norm`` and ``token_norm``, in float32 at least; nothing where the schedule has no latent span.
    """
    if not output.thoughts:
        return {}
    latent = np.concatenate([np.full(span.length, isinstance(span, Latent)) for span in batch.schedule])
    return {
        "thought_norm": _mean_norm(jnp.concatenate(output.thoughts, 1), batch.valid[:, latent]),
        "token_norm": _mean_norm(decoder.embed(batch.tokens), batch.valid & ~latent),
    }


class NormAlert:
    """Warns, once a crossing, when thoughts are more than ``factor`` times as long as token embeddings, or as short.

    Args:
      factor: None never warns.
    """

    def __init__(self, factor: float | None):
        self._factor, self._outside = factor, False

    def look(self, averages: Mapping[str, float], step: int) -> dict[str, bool]:
        """Looks at some steps' averages.

        Returns:
          ``norm_alert``, whether the ratio is outside; nothing where no factor is set or no thoughts were made.
        """
        if self._factor is None or "thought_norm" not in averages:
            return {}
        thought, token = averages["thought_norm"], averages["token_norm"]
        # Written so that a norm that is not a number is outside.
        outside = not token <= thought * self._factor <= token * self._factor**2
        if outside and not self._outside:
            LOG.warning(
                "step %d: the mean norm of thoughts, %.3g, is %.3g times that of token embeddings, %.3g: outside "
                "[1/%g, %g] (RunConfig.norm_alert_factor)",
                *(step, thought, thought / token if token else float("nan"), token, self._factor, self._factor),
            )
        self._outside = outside
        return {"norm_alert": outside}


def _mean_norm(x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Ratio:
    x = jax.lax.stop_gradient(x)
    return ratio(jnp.linalg.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1), valid)
