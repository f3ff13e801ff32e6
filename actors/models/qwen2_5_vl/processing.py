"""Images are cut into patches as in Qwen2-VL; its functions, under this family's name."""

from vlmrt.actors.models.qwen2_vl.processing import image_grid_thw, num_image_tokens, resized_size, smart_resize

__all__ = ["image_grid_thw", "num_image_tokens", "resized_size", "smart_resize"]
