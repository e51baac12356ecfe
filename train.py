import torch
print("hi")