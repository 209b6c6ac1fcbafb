import torch
class _R:
    def __init__(s, grid, share, contexts=1, tshare=None): s.n=grid[0]*grid[1]; s.k=max(1,round(share*s.n)); s.c=contexts; s.t=tshare
    def sample(s,B,seed,step,rank=0):
        g=torch.Generator().manual_seed(seed*1000003+step)
        p=torch.rand(B,s.c,s.n,generator=g).argsort(-1)
        ctx=p[...,:s.k].sort(-1).values; tgt=p[...,s.k:]
        if s.t: tgt=tgt[...,:round(s.t*s.n)]
        tgt=tgt.sort(-1).values
        return (ctx,tgt) if s.c==1 else (ctx,tgt.unsqueeze(2))
class _I:
    def __init__(s, grid, share, ar=(0.75,1.5)): s.g=grid; s.n=grid[0]*grid[1]; s.k=max(1,round(share*s.n)); s.ar=ar
    def sample(s,B,seed,step,rank=0):
        g=torch.Generator().manual_seed(seed*1000003+step); H,W=s.g
        r=float(torch.empty(1).uniform_(*s.ar,generator=g)); h=min(H,max(1,round((s.k*r)**.5))); w=min(W,-(-s.k//h))
        top=torch.randint(0,H-h+1,(B,),generator=g); left=torch.randint(0,W-w+1,(B,),generator=g)
        rows=torch.arange(H).view(1,H,1); cols=torch.arange(W).view(1,1,W)
        inside=((rows>=top.view(-1,1,1))&(rows<(top+h).view(-1,1,1))&(cols>=left.view(-1,1,1))&(cols<(left+w).view(-1,1,1))).flatten(1)
        key=torch.rand(B,s.n,generator=g)+(~inside)*2.0
        p=key.argsort(-1)
        return p[:,None,:s.k].sort(-1).values,p[:,None,s.k:].sort(-1).values
def build_masking(grid, mode, **k):
    from ijepa_transformers.masking import MultiBlockMasking
    if mode=="random": return _R(grid,k.get("visible_share",.3),k.get("num_contexts",1),k.get("target_share"))
    if mode=="inverse_block": return _I(grid,k.get("visible_share",.3))
    return MultiBlockMasking(grid, mode=mode, **k)
