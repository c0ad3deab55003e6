"""How long an artifact takes: measuring, the machine's conditions and limits, comparing runs."""
