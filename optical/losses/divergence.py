"""``SinkhornDivergence``: the Sinkhorn divergence of sets of vectors as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from torch import Tensor, nn

from optical.ot.divergence import check_divergence_options, sinkhorn_divergence

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from optical.ot.divergence import SolverOptions
    from optical.ot.functional import Cost

Reduction = Literal["mean", "sum", "none"]


class MassArguments(TypedDict, total=False):
    """Masses and padding, as in ``optical.sinkhorn_divergence``."""

    a: Tensor | None
    b: Tensor | None
    mask_a: Tensor | None
    mask_b: Tensor | None
    lengths_a: Tensor | None
    lengths_b: Tensor | None
    cu_seqlens_a: Tensor | None
    cu_seqlens_b: Tensor | None


class SinkhornDivergence(nn.Module):
    """Debiased transport cost between sets of vectors, 0 for equal sets; has no parameters.

    A module around ``optical.sinkhorn_divergence``, which documents the tensors, the options and
    the warnings. It replaces GeomLoss's debiased ``SamplesLoss("sinkhorn", p=2)``, which is half of
    it with ``epsilon=2 * blur ** 2`` and ``rho=2 * reach ** 2``.

    Args:
        epsilon: temperature > 0, in the unit of the cost.
        cost: "sqeuclidean" by default, as in GeomLoss, not "cosine" as in the functions of this
            package; see ``optical.sinkhorn_vectors`` for others.
        reduction: "mean" over the problems of the batch, where a problem without vectors counts as
            0; "sum"; or "none" for one value per problem.
        **options: rho, gradient, max_iter, tol and the other options of
            ``optical.sinkhorn_divergence``.

    Raises:
        TypeError, ValueError: an option is unknown, or has a wrong type or value.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (arXiv 1810.08278).

    Examples:
        >>> import torch
        >>> from optical.losses import SinkhornDivergence
        >>> loss = SinkhornDivergence(epsilon=0.1)
        >>> x = torch.tensor([[[0.0], [1.0]]], requires_grad=True)
        >>> value = loss(x, x.detach() + 2)
        >>> value.backward()
        >>> value.round(decimals=3), x.grad.flatten().round(decimals=3)
        (tensor(4., grad_fn=<RoundBackward1>), tensor([-2., -2.]))
    """

    def __init__(
        self,
        epsilon: float,
        *,
        cost: Cost = "sqeuclidean",
        reduction: Reduction = "mean",
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"epsilon": epsilon, "cost": cost, **options}
        check_divergence_options("SinkhornDivergence", epsilon, {"cost": cost, **options})
        if reduction not in get_args(Reduction):
            expected = ", ".join(repr(name) for name in get_args(Reduction))
            raise ValueError(f"reduction is {reduction!r}; expected one of {expected}")
        self.reduction: Reduction = reduction

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        log_a: Tensor | None = None,
        log_b: Tensor | None = None,
        **masses: Unpack[MassArguments],
    ) -> Tensor:
        """Compute the loss; see ``optical.sinkhorn_divergence`` for the arguments.

        Returns:
            A scalar, or (batch,) with ``reduction="none"``.
        """
        values: Tensor = sinkhorn_divergence(x, y, log_a, log_b, **masses, **self.options)
        if self.reduction == "mean":
            return values.mean()
        if self.reduction == "sum":
            return values.sum()
        return values

    def extra_repr(self) -> str:
        """Return the options, as shown by ``repr``."""
        shown = self.options | {"reduction": self.reduction}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
