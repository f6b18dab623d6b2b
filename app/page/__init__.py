"""What people look at: plain figures in, a page out. Nothing here is part of the algorithm."""
