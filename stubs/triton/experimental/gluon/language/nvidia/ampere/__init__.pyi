from triton.experimental.gluon.language.nvidia.ampere import async_copy as async_copy
