"""`GrowingCache` holds what `DynamicCache` holds, without copying all of it for every token."""
