"""What ``kvfold bench`` is made of: the shapes, the clock, kvfold's kernels, the others', and how it is shown.

cases    shapes and the bytes they hold, without torch
kernel   a kernel that is ready to be timed
timing   CUDA-graph replays with a cold L2
ours     kvfold's operations, and the check of their output
rivals   one function per rival
runner   goes through the cases
report   table, JSON, plot
"""
