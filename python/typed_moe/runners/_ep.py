"""Expert parallelism: a runner, wrapped in an exchange of tokens between ranks."""

from __future__ import annotations

from typing import Protocol, final

from torch import Tensor

from typed_moe.config import Placement
from typed_moe.routing import Routed
from typed_moe.runners._base import NO_BUFFERS, CallBuffers, MoeRunner


class Dispatched(Protocol):
    """**Protocol:** the tokens that this rank's experts see, and their way back.

    One call's state, and no other's: two micro-batches may be under way at once.
    """

    @property
    def hidden_states(self) -> Tensor:
        """(N, H); N may be 0."""
        ...

    @property
    def router_logits(self) -> Tensor:
        """(N, E), over all the experts and not this rank's alone."""
        ...

    def combine(self, partial_output: Tensor) -> Tensor:
        """Add up what the ranks' experts gave.

        Every rank calls it, one without tokens too: the others wait for it.

        Args:
            partial_output: (N, H), this rank's experts' share of each token of the dispatch. It
                may be written to.

        Returns:
            (T, H) in the same dtype: this rank's own tokens, summed over the ranks.
        """
        ...


class TokenExchange(Protocol):
    """**Protocol:** how tokens get to the ranks that hold their experts, and the sums back.

    SGLang's token dispatchers and vLLM's prepare and finalize are the same seam. What travels
    are hidden states and logits, so every rank routes by itself, over all experts and in global
    ids; an all-to-all that sends a token only to the owners of its experts fits here as well.
    """

    @property
    def name(self) -> str:
        """What it does, in a few words, for the plan."""
        ...

    def check(self, placement: Placement) -> None:
        """Refuse a layer whose shards are not this exchange's ranks.

        Raises:
            ValueError: the ranks' number or this rank's place is not the placement's.
        """
        ...

    def dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> Dispatched:
        """Give this rank's tokens away, and get those that its experts see.

        Every rank calls it, one without tokens too, with the same dtypes.

        Args:
            hidden_states: (T, H), T of 0 or more.
            router_logits: (T, E).
        """
        ...


@final
class EpMoeRunner:
    """A runner whose partial sums are added over the ranks: y = sum over ranks of runner(x)."""

    def __init__(self, runner: MoeRunner, exchange: TokenExchange) -> None:
        self._runner, self._exchange = runner, exchange

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers = NO_BUFFERS,
    ) -> Tensor:
        """(T, H) in the dtype of `hidden_states`: the whole sum, of this rank's tokens.

        Raises:
            ValueError: buffers are given: what a rank computes is not its own tokens' result.
            TypeError: the tokens are routed already; what travels are their logits.
        """
        if isinstance(router_logits, Routed):
            raise TypeError(
                "the tokens are routed already, and this exchange sends logits; give ids and "
                "weights to a layer without an exchange, whose partial sums the host adds"
            )
        if buffers is not NO_BUFFERS:
            raise ValueError(
                "output and routing_replay_out are of this rank's kernel, and with an exchange "
                "that is given other tokens; leave them out"
            )
        dispatched = self._exchange.dispatch(hidden_states, router_logits)
        x = dispatched.hidden_states
        # No tokens, no launch; but the sum is the ranks' common work, and this one's in it.
        if x.shape[0] == 0:
            return dispatched.combine(x)
        partial = self._runner(x, dispatched.router_logits, e_score_correction_bias)
        return dispatched.combine(partial)
