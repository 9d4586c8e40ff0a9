"""The pictures of README and notebook, and the scripts that draw them."""
