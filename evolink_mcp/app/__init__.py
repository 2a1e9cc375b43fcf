"""Read the settings and build the objects of a server from them."""
