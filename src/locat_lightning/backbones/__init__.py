"""timm models with LocAt in them."""
