"""One thread per process, here and in every command that a test starts: more of them cost more than they gain."""

import os

import cv2
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
cv2.setNumThreads(1)
