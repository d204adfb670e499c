"""Checkpoints of a run: named tensors, written in the background, that fit any number of ranks and any ZeRO stage.

`layout` is what lies on disk, `tensors` moves tensors between files and the DeepSpeed engine, `writer` writes.
`tensor_file` opens files that may be damaged or hostile. `python -m launch.checkpoint` lists checkpoints, or compares
two by `diff`.
"""
