"""What subquad does not implement is computed by the original implementation, exactly, and reported."""
