//! Recipes and the builder for guest kernels, root file systems and guest programs.
