"""How good masks are: the measures of video object segmentation."""
