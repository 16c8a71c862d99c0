"""Any other network, cut into stages: torch.fx follows its forward, and a view beside it knows where it is cut."""
