"""One stage a file. Stages never import each other; they exchange artifacts."""
