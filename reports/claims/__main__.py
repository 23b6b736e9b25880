"The command `python reports/claims`; see `run.py`."

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the folder reports, in which the package claims is found

from claims.run import main

sys.exit(main())
