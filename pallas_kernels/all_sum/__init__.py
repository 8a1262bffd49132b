"""Sums and gathers of small arrays over the GPUs of one host, which a CUDA graph can hold."""

from pallas_kernels.all_sum.api import all_gather, all_sum, has_mail, misfit, open_mail
from pallas_kernels.all_sum.mail import MOST_BYTES

__all__ = ["MOST_BYTES", "all_gather", "all_sum", "has_mail", "misfit", "open_mail"]
