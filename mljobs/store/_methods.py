"""Types of the store methods that return jobs of the store's own class.

An operation returns jobs of its argument ``model``, which ``ParamSpec`` cannot express. At run time all of these are
``store_method`` and ``async_store_method``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, overload
from uuid import UUID

from mljobs.jobs import Bind, Claim, Page, Renewal
from mljobs.jobs._base import M
from mljobs.jobs._submitting import Submission
from mljobs.store._base import AsyncRunner, BlockingRunner, async_store_method, store_method

P = ParamSpec("P")
Operation = Callable[Concatenate[Bind, P], Any]

if TYPE_CHECKING:

    class SubmitMany(Protocol):
        @overload
        def __call__(self, jobs: Iterable[Submission], *, ids: Literal[False] = ..., **values: Any) -> int: ...
        @overload
        def __call__(self, jobs: Iterable[Submission], *, ids: Literal[True], **values: Any) -> list[UUID]: ...

    class AsyncSubmitMany(Protocol):
        @overload
        def __call__(
            self, jobs: Iterable[Submission], *, ids: Literal[False] = ..., **values: Any
        ) -> Coroutine[Any, Any, int]: ...
        @overload
        def __call__(
            self, jobs: Iterable[Submission], *, ids: Literal[True], **values: Any
        ) -> Coroutine[Any, Any, list[UUID]]: ...

    def submit_many_method(operation: Any, **options: Any) -> SubmitMany: ...
    def async_submit_many_method(operation: Any, **options: Any) -> AsyncSubmitMany: ...
    def job_method(operation: Operation[P], **options: Any) -> Callable[Concatenate[BlockingRunner[M], P], M]: ...
    def jobs_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[BlockingRunner[M], P], list[M]]: ...
    def page_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[BlockingRunner[M], P], Page[M]]: ...
    def claim_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[BlockingRunner[M], P], Claim[M]]: ...
    def claims_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[BlockingRunner[M], P], list[Claim[M]]]: ...
    def renewal_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[BlockingRunner[M], P], Renewal[M]]: ...
    def exchange_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[BlockingRunner[M], P], tuple[list[Exception | None], list[Claim[M]]]]: ...
    def async_job_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, M]]: ...
    def async_jobs_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, list[M]]]: ...
    def async_page_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, Page[M]]]: ...
    def async_claim_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, Claim[M]]]: ...
    def async_claims_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, list[Claim[M]]]]: ...
    def async_renewal_method(
        operation: Operation[P], **options: Any
    ) -> Callable[Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, Renewal[M]]]: ...
    def async_exchange_method(
        operation: Operation[P], **options: Any
    ) -> Callable[
        Concatenate[AsyncRunner[M], P], Coroutine[Any, Any, tuple[list[Exception | None], list[Claim[M]]]]
    ]: ...

else:
    submit_many_method = job_method = jobs_method = page_method = store_method
    claim_method = claims_method = renewal_method = exchange_method = store_method
    async_submit_many_method = async_job_method = async_jobs_method = async_page_method = async_store_method
    async_claim_method = async_claims_method = async_renewal_method = async_exchange_method = async_store_method
