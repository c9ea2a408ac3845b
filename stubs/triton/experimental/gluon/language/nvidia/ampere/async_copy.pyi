from triton.experimental.gluon.language import shared_memory_descriptor, tensor

def async_copy_global_to_shared(
    smem: shared_memory_descriptor,
    pointer: tensor,
    mask: tensor | None = None,
    cache_modifier: str = "",
    eviction_policy: str = "",
    volatile: bool = False,
) -> None: ...
def mbarrier_arrive(mbarrier: shared_memory_descriptor, increment_count: bool = True) -> None: ...
