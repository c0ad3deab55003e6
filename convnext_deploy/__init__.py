"""Deployment toolchain for ConvNeXt: see `convnext_deploy.api` for the functions and `docs/` for the pages."""
