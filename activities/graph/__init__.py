"""The context graph in Neo4j, and what is built from it. All Cypher is in this package."""
