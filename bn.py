"""Batch normalization in NumPy, and a toy MLP trained with it (assignment 2, task 1).

`python bn.py` trains the MLP and prints Figure 1: all 19 losses that the assignment prints, and its validation loss.
It needs no file and no network: the ten MNIST digits of the figure stand at the end of this file.

Source: S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", 2015, arXiv:1502.03167 (below: the paper).
"""

import base64
import zlib

import numpy as np


class BatchNorm:
    """Batch normalization of (B, C) arrays, with the conventions of torch.nn.BatchNorm1d.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, so that a constant channel is divided by sqrt(eps) and not by zero.
        momentum: weight of the newest batch in the running statistics.

    Attributes:
        gamma, beta: (C,) scale and shift, which start at 1 and 0. The caller updates them with backward's gradients.
        running_mean, running_var: (C,) statistics for inference, which start at 0 and 1. The variance is unbiased.
        training: whether forward normalizes with the batch's statistics (and remembers them) or the running ones.

    float32 input gives float32 output and gradients, float64 gives float64; all is computed in float64, because in
    float32 a mean far from 0, or a sum over many rows, has too few digits. No argument is modified.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        self.eps = eps
        self.momentum = momentum
        self.gamma = np.ones(num_features)
        self.beta = np.zeros(num_features)
        self.running_mean = np.zeros(num_features)
        self.running_var = np.ones(num_features)
        self.training = True
        self._saved = None  # what backward needs from the last forward in training mode

    def train(self):
        """Normalize with the statistics of each batch from now on. Returns self."""
        self.training = True
        return self

    def eval(self):
        """Normalize with the running statistics from now on (inference). Returns self."""
        self.training = False
        return self

    def forward(self, x):
        """y = gamma * (x - mean) / sqrt(var + eps) + beta: Algorithm 1 of the paper, in inference Algorithm 2.

        Args:
            x: (B, C), float32 or float64. In training B must be at least 2.

        Returns:
            y (B, C), of the dtype of x.

        Raises:
            ValueError: x has another shape or dtype; x is a single row in training (it has no variance); or gamma or
                beta has another shape than (C,).
        """
        x, channels = np.asarray(x), self.running_mean.shape
        if x.shape[1:] != channels or x.dtype not in (np.float32, np.float64):
            raise ValueError(f"x must be float32 or float64, (B, {channels[0]}), got {x.dtype}, {x.shape}")
        if not np.shape(self.gamma) == np.shape(self.beta) == channels:
            raise ValueError(f"gamma and beta must be {channels}, got {np.shape(self.gamma)}, {np.shape(self.beta)}")
        batch, dtype = len(x), x.dtype
        if self.training and batch < 2:
            raise ValueError(f"training needs at least 2 rows to have a variance, got x of shape {x.shape}")

        x = x.astype(np.float64)  # from here on all is float64
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean = x.mean(axis=0)
            var = ((x - mean) ** 2).mean(axis=0)
            unbiased_var = var * batch / (batch - 1)
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased_var
        std = np.sqrt(var + self.eps)
        x_hat = (x - mean) / std
        y = self.gamma * x_hat + self.beta
        if self.training:
            self._saved = x_hat, std, np.array(self.gamma), dtype
        return y.astype(dtype)

    def backward(self, dy):
        """Gradients of a loss with respect to the input and the parameters of the last forward in training mode.

        The loss depends on x through x_hat, mean and var. Section 3 of the paper goes back through each in turn. With
        std = sqrt(var + eps) and sums over the batch:

            dx_hat = gamma * dy        dgamma = sum(dy * x_hat)        dbeta = sum(dy)

            dvar   = sum(dx_hat * (x - mean)) * -1/2 / std^3  =  -1/2 / std^2 * sum(dx_hat * x_hat)
            dmean  = -sum(dx_hat) / std                          (var adds nothing, because sum(x - mean) = 0)
            dx     = dx_hat / std + dvar * 2 (x - mean) / B + dmean / B

        The sums in dvar and dmean are gamma * dgamma and gamma * dbeta, and x - mean is std * x_hat. So

            dx     = gamma / std * (dy - dbeta / B - x_hat * dgamma / B)

        Args:
            dy: (B, C), gradient of the loss with respect to y.

        Returns:
            dx (B, C), dgamma (C,), dbeta (C,), all of the input's dtype.

        Raises:
            ValueError: the shape of dy is not the input's.
            RuntimeError: there was no forward in training mode.
        """
        if self._saved is None:
            raise RuntimeError("backward needs a forward in training mode first")
        x_hat, std, gamma, dtype = self._saved
        dy, batch = np.asarray(dy, np.float64), len(x_hat)
        if dy.shape != x_hat.shape:
            raise ValueError(f"dy must have the shape of forward's input {x_hat.shape}, got {dy.shape}")

        dgamma = (dy * x_hat).sum(axis=0)
        dbeta = dy.sum(axis=0)
        dx = gamma / std * (dy - dbeta / batch - x_hat * (dgamma / batch))
        return dx.astype(dtype), dgamma.astype(dtype), dbeta.astype(dtype)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def binary_cross_entropy(logits, targets):
    """Summed -t log(p) - (1 - t) log(1 - p) of p = sigmoid(z): log(1 + exp(z)) - t z, which never takes log(0)."""
    return np.sum(np.logaddexp(0, logits) - targets * logits)


def main():
    """Train 784 -> 16 -> batch norm -> sigmoid -> 1 -> sigmoid to tell the digit 0 from others; print Figure 1."""
    digits = np.frombuffer(zlib.decompress(base64.b85decode(DIGITS.replace("\n", ""))), dtype=np.uint8)
    images = digits.reshape(10, 784) / 255
    x, val_x = images[:9], images[9:]
    targets, val_targets = np.eye(9)[:, :1], np.zeros((1, 1))  # 1 for the digit 0, 0 for the others

    rng = np.random.RandomState(14)  # the figure's seed; the draws below are in the figure's order
    w1 = rng.randn(784, 16)
    w2 = rng.randn(16, 1)
    bn = BatchNorm(16, momentum=1)  # so the running statistics are the last batch's, and are averaged below
    bn.gamma = rng.randn(16)
    bn.beta = rng.randn(16)

    iterations = 50
    learning_rate = 0.1
    mean_sum = std_sum = 0
    for iteration in range(1, iterations + 1):
        hidden = sigmoid(bn.forward(x @ w1))
        logits = hidden @ w2
        print(f"iteration: {iteration}, loss: {binary_cross_entropy(logits, targets):.6f}")
        mean_sum += bn.running_mean
        std_sum += np.sqrt(bn.running_var * (len(x) - 1) / len(x))  # the figure's sigma is biased: it divides by B

        dlogits = sigmoid(logits) - targets  # p - t, the derivative of log(1 + exp(z)) - t z
        dw2 = hidden.T @ dlogits
        dy = dlogits @ w2.T * hidden * (1 - hidden)
        dx, dgamma, dbeta = bn.backward(dy)
        w1 -= learning_rate * (x.T @ dx)
        w2 -= learning_rate * dw2
        bn.gamma -= learning_rate * dgamma
        bn.beta -= learning_rate * dbeta

    # The assignment asks for running means of mu and sigma. Its figure uses the plain mean over all batches.
    # (PyTorch's exponential averages, which BatchNorm keeps too, give 0.028781 in place of 0.028552.)
    bn.running_mean = mean_sum / iterations
    bn.running_var = (std_sum / iterations) ** 2
    val_logits = sigmoid(bn.eval().forward(val_x @ w1)) @ w2
    print(f"validation loss: {binary_cross_entropy(val_logits, val_targets):.6f}")


# The first image of each digit, 0 to 9, in the MNIST training set (Y. LeCun, C. Cortes, C. Burges): 10 * 28 * 28 bytes,
# compressed (zlib) and written as text (base 85).
DIGITS = """
c-rlmc~p*B9LKMvLW@MQl*|zsq#9#s7zu~5uh}yl$FVbIkSy6s3{IpIg$%|Z+1`vWiY(d2$=Hphl@!t{dVas>o%_70-sgGleb1PGX2$gU<9(m!{hWL6@BZ%c
``-H!@{d}Fow)N0Hgd@YfY(gaDFfk6Hn<t9NS$t}fN*Uj;35^<L+e8T?|9s&aw8WpVJ>Dm57F*txDjhMz~7n>ER?(2YA<Hr99i~^uvZ_MXdtg|ecN(&L7%w+
xL3R=SP~{wzG(5H9vb)-e28ATFg@l8&l^`X9gL^VWGtlut%9_^M8-CicXKZsl6QO*rj<R+&Bfh{pm@UjP!~H-O&X@`>!M-+&+gNYiz`(_V0&3N1lgNdquO{m
WgA+OD&yJ`)Vgz!caebIIc%B0WxZbsx9w{&QMXJ%n8>Md8)7^MH9+BIPc~|P1BC!iv1tOHtjk72^MphjPK}7TlT+gsK@c1{d&?6+h~X5=5rm6o9EO50mV<U`
5$!pxWn#&Cc8p060Uz^5+YoD%$Y=i(GjBY3kqMK0w&f<>e?l3g_0}T5)Z6f)wUX4``i7QyVBZp;n`&)Q0uSv7i~R!dcwaL@1~FKZ<zF?Fz9%zSx$WSvIsS|M
ufh2m>J-;87LiW2%oa*w)F}fBGouRtvgRvNqw!#XrCo`Y6c-pRi<(g|z;R1reH}|y90EAm)77;c)mQ`hGwP9!SKxsMvG`_BK2+wC=}<7ns$X;w1lZ}`#~wdk
v2|xb@r?(xp(SeXNwVaDW}ZV$)`)tA_}ds)ZSx;*t=dkfQ-a!IW%$~zOHG$@u4GXba;AYYNu;x`ayA>_d0<drU_67>w6kj@eOsgh#ITnj@hk+`$VOwNIxSda
{GAeteygqA<(DQVCQ5$hPO()Wr>Et8IHs!2DMgBiE-w95(0=ik?WlzS^ydY&t^qbm#f%1gaC=gLl6@Tqx<z6&f$lMd9x_H(<mT1XuG2o889|h+%<y@HGJm-4
(2<A9p-yV=Os2ksn5m7b)&=SHqEZ5MA0}rDk5{sQJu*~1;#Osbcr0g4MLjwERL<hWr4`TZi{&gytdz<NMH#cn674FLgt$<4Y!M$=>akuG&laOJ@5J$X3Pkjz
pU$rHHiqXH=EUZMUXBaL*U8DrD3<0Wg^af~$}ZJ!!S9%4lghlCBJy>`0dcJX=JxlPcA|lD-Ue8Nfjarj+d#Qb*lJi=Sp}>)(&T4t$uj-ln>kF3jMin2v=}V7
&_jQR$;A&Qcnu%kMJA=K9_c{RiIRMVUf(_w@rEgB8_96QqFN-5<GQ&H6RPu=X#)1)7HpB9_T#K-95^fw(XTNFI-N!gZ_0s|UVy)H8-0)OdoV%!m2rs4te!ZA
J)?0eJ;6})bDu~dy*gM$Y<k|+1$&sPLaT$iakwy4nK4P{m~@F01(~W_T0_B|;6Tg&l)!nK#zUKP;3%8eTtc{6pIx5@aJ~n-m>W&FV|i{M4&nH*3SxQFDCzBE
-o3^UgkW3F<XexhKzjIY{d$#DKC4B#VbArY4rvw54g^eTNn8#C6x_qhvO}r)Y{*=xySVzv)gAB2SU-ROVxxh)Fq3xo^TK3R`T-DfNxHbA!BIF9jE9NKGxU*y
<D+mh7!DDa42Vk4x!TlB9cH&_c{JA9YL(TYpiGx4+$ggF@s#cGaj#N0{|fuwe>dV?25_GlEl7h{dQWlDcP>3WAMlz^z{;0(?-bpSj`bZqQUT&*>@)?%vpPy@
hMu__=%YSVazE`_ex}(VD|QOtyiPRL8<+RtslrCwNGKD@{s6yo<no{rcsGN09|SOkgI3dX2j}+5I1XVZJI&RZ0=S30F`MrPn8QhqpVNZ?$B)+A;2!5*itGj8
^{j0ygmc^{YvG9_S8v0RPibzOUVqk{^?MU%=VsrE_svyeBJ$KJdg=^1qCKO^J9B8-eY-0YQJkPe%Zo8;tu=AU#%$F+;W{yeN*9M{u}D2uo$uf-(<T~x<;yq&
Zo|x>)R);T|2I%yM2xg!-aJVxwiQ!F9u!3}mK~~tlHSlTgSA-1>)Y`Pi+Q2wZ|;Rrtn1G=IIvdpN65M{4ie82qggp3Yx)Laf{`b_Vu?=@fd|eZ4q|q|hj#nb
irP$8Z$aT%->R+t<E?YpEkxhZVV%`z^b5fFTQvVG|8gTW-3lPV!^rFe;5^1%Y@7ul6KLkJRt-FaO4myFLA415V98NBvb6>m;|it9dZCk#4p#vVD8+I^fMyN-
F6AQ#sySnsrIRS>8IZ;3_Dg*DLz_nDAcPl~?ppTBl&mj;H8-LLn4xkr3@|4x^4t3Zy6_Lv5Z{K!EKWkSDHm>rHh*dU{0TcC3Q_
"""

if __name__ == "__main__":
    main()
