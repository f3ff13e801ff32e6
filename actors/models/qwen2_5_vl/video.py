"""Clips are sampled and sized as in Qwen2-VL; only its vision config, which has tokens_per_second, tells them apart."""

from vlmrt.actors.models.qwen2_vl.video import ClipPlan, FrameChoice, frame_choice, plan_clip

__all__ = ["ClipPlan", "FrameChoice", "frame_choice", "plan_clip"]
