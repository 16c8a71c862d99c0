"""Any other module, cut into stages."""
