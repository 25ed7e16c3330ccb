"""How long thoughts are beside token embeddings: what breaks first where a model meets inputs unlike any it knows."""

import logging
from collections.abc import Mapping

LOG = logging.getLogger(__name__)


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
