from models.respike import ReSpike

__all__ = ["ReSpike"]
