"""The endpoints, thin: what is asked → storage and queue → what is answered."""

from fastapi import APIRouter, Depends

from service.routes import artifacts, create, events, health, jobs, metrics
from service.services import check_owner

router = APIRouter(dependencies=[Depends(check_owner)])
router.include_router(create.router, tags=["jobs"])
router.include_router(jobs.router, tags=["jobs"])
router.include_router(events.router, tags=["jobs"])
router.include_router(artifacts.router, tags=["artifacts"])
router.include_router(health.router, tags=["service"])
router.include_router(metrics.router)
