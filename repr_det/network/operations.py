"""The names of torch's operations, by what they make of a channel that is 0."""

CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "miopen_convolution"}
# Sums of products: a channel that is 0 adds nothing.
READS = CONVOLUTIONS | {
    *("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "mv", "dot", "_scaled_dot_product_attention_math"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "deform_conv2d"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_trilinear"),
}
# (input, weight, bias, ...)
NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm", "batch_norm_elemt", "native_group_norm"),
}
# Values stay what they are.
COPIES = {"_to_copy", "clone", "detach", "alias", "contiguous", "_conj", "_neg_view", "to_mkldnn"}
# Every output is a sum, a copy or the largest of inputs of one channel, at their place or another.
OF_A_CHANNEL = COPIES | {
    *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "native_dropout", "_fused_dropout", "reflection_pad2d"),
    *("replication_pad2d", "grid_sampler_2d", "flip", "roi_align", "_roi_align", "roi_pool"),
}
# The same, but channels need not stay where they were.
OF_CHANNELS = {
    *("cat", "stack", "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "squeeze", "unsqueeze", "as_strided", "index"),
    *("gather", "index_select", "index_put", "slice_scatter", "select_scatter", "repeat", "unfold", "im2col", "roll"),
    *("diagonal", "mean", "sum", "amax", "pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle"),
    "linalg_vector_norm",
}
# How many of the arguments are data; the others say where to look.
STEERED = {"deform_conv2d": 2, "grid_sampler_2d": 1, "roi_align": 1, "_roi_align": 1, "roi_pool": 1}
# Element by element, though torch does not tag them so.
ELEMENTWISE = {"hardswish", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_functional"}
SUMS = {"mean", "sum", "amax", "linalg_vector_norm"}
PAD = "constant_pad_nd"
MOVES = OF_A_CHANNEL | OF_CHANNELS | {PAD}
